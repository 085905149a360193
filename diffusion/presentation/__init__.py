"""What people are shown of a run: plots, the gallery's page, a version's card. No MLflow and no Prefect in here."""
