"""Published warehouses, read where they lie: a folder, an object store, the Hub, or a web server."""
