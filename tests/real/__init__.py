"""A real Kubernetes API server and a real Jaeger in the place of the stand-ins: ``make real`` builds and runs them."""
