"""Thin controllers, one file a resource: parse, call one service, shape the answer."""
