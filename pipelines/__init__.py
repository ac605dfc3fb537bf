"""Everything that knows a host: attaching to diffusers, bundled models, recipes, measuring, generating."""
