"""Pruning as a service: uploads, jobs, results, over gRPC. See docs/server.md."""
