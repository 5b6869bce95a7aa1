"""Generated from proto/inference by `make proto`, in a descriptor pool of its own."""

from google.protobuf import descriptor_pool

POOL = descriptor_pool.DescriptorPool()
