"""What is done with a finished adapter, on demand: no stage of the pipeline runs anything from here."""
