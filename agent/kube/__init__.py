"""Kubernetes: process -> container -> pod -> resource attributes, and which pods are traced."""
