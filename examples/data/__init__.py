"""From text to batches: corpora, vocabularies, what a task hides, the pipeline."""
