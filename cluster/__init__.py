"""Everything with sockets: framing, sessions, links, and the node process.

Lower parts know no I/O (`wire`, `session`, `health`), the upper ones own it
(`unixsock`, `link`, `node`).  Nothing here imports `plugin`; see docs/architecture.md.
"""
