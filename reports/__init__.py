"""Views of a run: the HTML report, pictures, the model card, MLflow. A run is complete without them."""
