"""Rules and queries. A service takes a session; it never commits and never calls the network."""
