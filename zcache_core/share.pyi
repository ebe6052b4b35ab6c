# no names for Python: the C face is in the .pxd
