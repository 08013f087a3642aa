"""From raw text to a served R1-like model: a durable Ray DAG of training stages. Importing this package is cheap."""

from ray_pipeline.own_model import claim_model

__version__ = "0.1.0"

claim_model()
