"""C face of what Python has of such a connection."""

from cluster.lanesend cimport LANE_MORE, LANE_ODD, LANE_OVER, Lane


cdef class LaneEnd:
    cdef Lane lane
    cdef bint started
    cdef bint alike             # its thread is of the class of who starts it
    cdef void give_back(self)
