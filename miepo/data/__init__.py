"""Prompts, their order in a run, and the LightningDataModule that turns them into rollouts with feedback."""
