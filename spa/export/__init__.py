"""From a framework's model to ONNX: thin over each framework's own exporter, and checked against the source's outputs.

`spa.export.run` is the way in. A framework is imported in a process of its own, by the Python that has it (`worker`,
`drivers`): nothing here needs one.
"""
