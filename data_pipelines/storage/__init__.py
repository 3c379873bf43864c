"""Any bytes of a file, wherever it lies, and remote ones kept on a disk of the node."""
