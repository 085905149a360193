"""Programs beside the flow: the demo, and a version trained again."""
