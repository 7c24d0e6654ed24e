"""Boot images: from bytes to guest memory and the state of the first vCPU.

Records of this package are NamedTuples, not frozen dataclasses: the latter compile half a dozen
methods each when they are imported, 4 million instructions against 0.6, and with every start.
"""
