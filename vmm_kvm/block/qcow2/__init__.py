"""The qcow2 image format, versions 2 and 3.

Source: QEMU docs/interop/qcow2.rst ("qcow2 specification" in this package).
"""
