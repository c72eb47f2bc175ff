"""Accounts, teams and keys on the wire."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from control_plane.money import usd
from control_plane.schemas.base import In, Money, Out, said
from control_plane.tables import Team
from control_plane.tables.accounts import Role, Scope, TeamRole, Tier

Email = Annotated[str, said("Invalid email format", max_length=320, pattern=r"^[^@\s]+@[^@\s.]+(\.[^@\s.]+)+$(?!\n)")]
Password = Annotated[str, said("Password must be at least 8 characters", min_length=8, max_length=1024)]
PersonName = Annotated[str, said("Name must be at least 2 characters, at most 100", min_length=2, max_length=100)]
Organization = Annotated[str, said("Organization must be at most 200 characters", max_length=200)]


class Signup(In):
    email: Email
    password: Password
    name: PersonName
    organization: Organization | None = None


class Signin(In):
    email: Annotated[str, said("Invalid email format", max_length=320)]
    password: Annotated[str, said("Password is too long", max_length=1024)]


class ChangeMe(In):
    name: PersonName | UnsetType = UNSET
    organization: Organization | UnsetType | None = UNSET


class NewUser(Out):
    id: str
    email: str
    name: str
    created_at: datetime


class UserOut(Out):
    id: str
    email: str
    name: str
    organization: str | None
    role: Role
    subscription_tier: Tier
    created_at: datetime


class NewUserData(Out):
    user: NewUser


class UserData(Out):
    user: UserOut


class SigninData(Out):
    user: UserOut
    access_token: str
    expires_at: datetime


class CreateKey(In):
    name: Annotated[str, said("Name must have 1 to 100 characters", min_length=1, max_length=100)]
    scopes: tuple[Scope, ...]
    expires_at: Annotated[datetime, Meta(tz=True)] | None = None


class KeyOut(Out):
    """A key without its secret part."""

    id: str
    name: str
    prefix: str
    scopes: list[str]
    created_by: str
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None


class NewKey(Out):
    id: str
    key: str
    """The whole key: shown this once."""
    name: str
    prefix: str
    scopes: list[str]
    expires_at: datetime | None


class Keys(Out):
    keys: list[KeyOut]


class TeamOut(Out):
    id: str
    name: str
    role: TeamRole
    personal: bool
    monthly_budget: Money | None
    created_at: datetime

    @classmethod
    def seen(cls, team: Team, role: TeamRole, user_id: str) -> TeamOut:
        budget = team.monthly_budget_microusd
        limit = None if budget is None else usd(budget)
        return cls.of(team, role=role, personal=team.personal_of == user_id, monthly_budget=limit)


class Teams(Out):
    teams: list[TeamOut]
