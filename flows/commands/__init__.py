"""Programs beside the flow: the demo, a model scored in another way, and a version trained again."""
