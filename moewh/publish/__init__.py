"""Publishing: send complete, verified runs of a warehouse to a folder, an object store or the Hub."""
