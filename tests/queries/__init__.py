"""Every view, saved query and check, compared with counts by hand and by brute force."""
