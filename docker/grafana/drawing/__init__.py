"""Pictures of the dashboards without a Grafana server: questions to Prometheus, and how panels look."""
