"""Exporting models to runtimes: ``torch.export`` files, ONNX and AOTInductor packages, each checked against eager."""

from .exporter import FORMATS, ExportError, Mismatch, compare_with_eager, export_model, missing_requirement

__all__ = ["FORMATS", "ExportError", "Mismatch", "compare_with_eager", "export_model", "missing_requirement"]
