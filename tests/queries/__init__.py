"""Every view, saved query and check against counts made by hand and by brute force."""
