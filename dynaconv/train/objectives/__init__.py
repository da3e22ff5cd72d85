"""What fine-tuning minimises: one file a loss or family of losses, named in :class:`dynaconv.config.LossesConfig`."""
