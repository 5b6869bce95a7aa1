"""The services of proto/spa/v1, one module each. Authentication, limits and errors are the guard's."""
