//! Intel VT-d (Intel Virtualization Technology for Directed I/O, architecture specification, rev 4.1).
