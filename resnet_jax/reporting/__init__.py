"""What a run reports: pages, figures, evaluation, model card."""
