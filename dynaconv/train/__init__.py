"""Fine-tuning: dial sampling, losses, engines, one loop, exact resume."""
