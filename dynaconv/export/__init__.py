"""Export: one file a target, each says whether it can hold the model, writes, and is reloaded and checked."""
