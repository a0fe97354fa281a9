"""Rules of the node, without clock or I/O: order admission, credit, tabs, pricing, metering. Imports no other package of the
node.
"""
