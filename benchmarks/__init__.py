"""One command a claim: each shows what it claims, prints versions and machine, and ends with 1 when the claim fails."""
