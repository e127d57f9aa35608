"""Lightning's Trainer and Fabric: the strategies and what they need."""
