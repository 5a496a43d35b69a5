"""What many explained lesions tell together: groups, modalities, context, errors, and whether explanations can be trusted."""
