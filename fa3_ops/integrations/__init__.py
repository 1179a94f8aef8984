"""What serving and training systems call by their own extension points; public functions only."""
