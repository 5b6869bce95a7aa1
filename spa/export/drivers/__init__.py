"""One file per kind of source. Each runs in the Python that has its framework, and imports it when it is opened."""
