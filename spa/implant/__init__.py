"""Neural implants: k x k channels of convolutions that become 1 x 1 instead of leaving (HAP, arXiv 2101.08940)."""

from spa.implant.record import Place, Record, is_record
from spa.implant.run import Implanted, Report, apply, implant, verify

__all__ = ["Implanted", "Place", "Record", "Report", "apply", "implant", "is_record", "verify"]
