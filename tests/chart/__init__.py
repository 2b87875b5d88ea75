"""The Helm chart: what the real Helm engine makes of it."""
