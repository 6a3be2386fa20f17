"""SageMaker: what its containers run (`python -m serving.sagemaker`), and what starts them (`.launch`)."""
