"""Published warehouses, read in place: from a folder, an object store, the Hub, or a web server."""
