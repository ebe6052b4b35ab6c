"""The tests.  A file's name says the floor it stands on; files run in that order.

t0  the repository itself        t5  disk, tiers, pressure
t1  memory, codec, framing       t6  device, configuration
t2  allocators, index            t7  the plugin in a real nbdkit
t3  store                        t8  a real Linux that swaps (swaplab)
t4  cold tiers                   t9  the command and the make targets
"""
