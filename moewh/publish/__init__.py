"""Publishing: complete, verified runs of a warehouse, sent to a folder, an object store or the Hub."""
