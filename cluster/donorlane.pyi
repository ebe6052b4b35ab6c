from cluster.lane import LaneEnd
from zcache_core.donation import Donation

class Lending:
    health: int
    def __init__(self, donation: Donation) -> None: ...

class DonorLane(LaneEnd):
    def __init__(self, lending: Lending) -> None: ...
    def welcome(self, row: int, epoch: int) -> None: ...
