"""Wire shapes: camelCase, money as decimal strings, times as ISO-8601 UTC."""
