"""Speed against a peer and memory against its limit; see README.md."""
