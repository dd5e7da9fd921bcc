"""Reinforcement learning: rollouts, rewards, experience."""
