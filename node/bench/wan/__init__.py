"""`resbm-node bench wan`: training over shaped links."""
