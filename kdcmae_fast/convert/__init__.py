"""Published checkpoints (CAV-MAE, KDC-MAE, ImageNet MAE) to our models and back."""

from .published import convert_checkpoint, export_published, init_model, load_published

__all__ = ["convert_checkpoint", "export_published", "init_model", "load_published"]
