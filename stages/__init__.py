"""The stages of the pipeline: one module a stage, named as in dvc.yaml; what they share is in `stages.common`."""
