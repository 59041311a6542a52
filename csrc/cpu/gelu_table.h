// e^(a^2/2) Phi(-a) in s = a - i/2 for i from 0 to 31, relative error 2^-27.2:
// what the constant coefficients lose by rounding to fp32, then the coefficients of s^0 to s^6.
// Made by scripts/fit_polynomials.py --gelu.
#pragma once

namespace detinfer {
namespace {

alignas(64) constexpr float kGeluTail[8][32] = {
    {
        -0x1.736416p-36f, 0x1.a98496p-27f, 0x1.cef98ep-33f, -0x1.a5db52p-29f,
        0x1.5a54aap-28f, 0x1.8b805cp-30f, 0x1.18f4dcp-31f, -0x1.870edp-31f,
        -0x1.cdac8cp-30f, -0x1.89d408p-29f, 0x1.698ef8p-29f, -0x1.b4c90ap-29f,
        0x1.8f62bep-29f, 0x1.6c52cap-31f, 0x1.c91126p-30f, 0x1.7b77fcp-30f,
        0x1.7a866ep-32f, -0x1.df6f06p-30f, -0x1.18fceap-31f, -0x1.a112ap-30f,
        0x1.c8dda8p-30f, -0x1.65c104p-32f, -0x1.999acap-32f, 0x1.c1f41cp-31f,
        -0x1.c4d9cep-30f, -0x1.f87cp-30f, 0x1.7a2c42p-32f, -0x1.e0dc42p-32f,
        -0x1.23e682p-31f, -0x1.818422p-34f, 0x1.a21c26p-31f, 0x1.537a82p-31f,
    },
    {
        0x1p-1f, 0x1.66027ap-2f, 0x1.0bdb2ep-2f, 0x1.a57056p-3f,
        0x1.5845dcp-3f, 0x1.217252p-3f, 0x1.f1b89cp-4f, 0x1.b396fap-4f,
        0x1.82b4bcp-4f, 0x1.5b5acep-4f, 0x1.3b0fbcp-4f, 0x1.201faap-4f,
        0x1.095608p-4f, 0x1.eba5fep-5f, 0x1.c9e12p-5f, 0x1.ac6292p-5f,
        0x1.926972p-5f, 0x1.7b5f34p-5f, 0x1.66ccb8p-5f, 0x1.545298p-5f,
        0x1.43a38ap-5f, 0x1.34805ap-5f, 0x1.26b4dp-5f, 0x1.1a1574p-5f,
        0x1.0e7dcep-5f, 0x1.03cf06p-5f, 0x1.f3ddc2p-6f, 0x1.e18ddcp-6f,
        0x1.d087aep-6f, 0x1.c0a9c4p-6f, 0x1.b1d706p-6f, 0x1.a3f60ap-6f,
    },
    {
        -0x1.988452p-2f, -0x1.cb063p-3f, -0x1.19524cp-3f, -0x1.71c04cp-4f,
        -0x1.00f9dap-4f, -0x1.75ab64p-5f, -0x1.19cef2p-5f, -0x1.b6038ap-6f,
        -0x1.5cf97cp-6f, -0x1.1be2c6p-6f, -0x1.d614ecp-7f, -0x1.8b1956p-7f,
        -0x1.5068c2p-7f, -0x1.21ae92p-7f, -0x1.f7d59ep-8f, -0x1.b9fa6ap-8f,
        -0x1.86b844p-8f, -0x1.5bcb3ep-8f, -0x1.378124p-8f, -0x1.188feep-8f,
        -0x1.fbf2dp-9f, -0x1.cdeeacp-9f, -0x1.a5dac2p-9f, -0x1.82bdeep-9f,
        -0x1.63cfc8p-9f, -0x1.486db4p-9f, -0x1.3012a8p-9f, -0x1.1a5102p-9f,
        -0x1.06cdbep-9f, -0x1.ea79b4p-10f, -0x1.cabcdap-10f, -0x1.adf8e8p-10f,
    },
    {
        0x1.ffffb8p-3f, 0x1.e681e2p-4f, 0x1.fcc824p-5f, 0x1.20403ap-5f,
        0x1.5d300ap-6f, 0x1.bf399ep-7f, 0x1.2c08cap-7f, 0x1.a29f06p-8f,
        0x1.2dda04p-8f, 0x1.bfbaeep-9f, 0x1.542a9ap-9f, 0x1.07e3eap-9f,
        0x1.a0eee4p-10f, 0x1.4ea508p-10f, 0x1.106374p-10f, 0x1.c0f9d2p-11f,
        0x1.7625d6p-11f, 0x1.3ae804p-11f, 0x1.0b6e08p-11f, 0x1.c9eb5ep-12f,
        0x1.8af23ep-12f, 0x1.56ee3ep-12f, 0x1.2b9aa2p-12f, 0x1.073c62p-12f,
        0x1.d0fb64p-13f, 0x1.9ca85p-13f, 0x1.6fdc4p-13f, 0x1.494a5p-13f,
        0x1.27e806p-13f, 0x1.0ade66p-13f, 0x1.e2fd9p-14f, 0x1.b6748ep-14f,
    },
    {
        -0x1.105174p-3f, -0x1.c1d588p-5f, -0x1.9afc3ep-6f, -0x1.997d68p-7f,
        -0x1.b75cfcp-8f, -0x1.f625bp-9f, -0x1.2ed67ep-9f, -0x1.7e817ep-10f,
        -0x1.f6a45cp-11f, -0x1.55bbb4p-11f, -0x1.dea6dap-12f, -0x1.57ff5ap-12f,
        -0x1.f9cc6cp-13f, -0x1.7b5f9cp-13f, -0x1.21a60cp-13f, -0x1.c159b8p-14f,
        -0x1.61890ap-14f, -0x1.19ba2ap-14f, -0x1.c63986p-15f, -0x1.720776p-15f,
        -0x1.30557p-15f, -0x1.f8ff22p-16f, -0x1.a65b06p-16f, -0x1.63dacp-16f,
        -0x1.2ddfap-16f, -0x1.01b37cp-16f, -0x1.ba914ap-17f, -0x1.7e19d2p-17f,
        -0x1.4b934ep-17f, -0x1.2119a2p-17f, -0x1.fa60dep-18f, -0x1.bd5508p-18f,
    },
    {
        0x1.fec5fp-5f, 0x1.7606p-6f, 0x1.2f453ep-7f, 0x1.0d5eap-8f,
        0x1.02ffeep-9f, 0x1.0ac146p-10f, 0x1.239cf8p-11f, 0x1.4fb424p-12f,
        0x1.943bdep-13f, 0x1.fa3bp-14f, 0x1.4810c6p-14f, 0x1.b643a2p-15f,
        0x1.2cab54p-15f, 0x1.a673f6p-16f, 0x1.2f218ep-16f, 0x1.bb59f8p-17f,
        0x1.49cbdp-17f, 0x1.f245cap-18f, 0x1.7db4d8p-18f, 0x1.282786p-18f,
        0x1.d0ed6p-19f, 0x1.70d948p-19f, 0x1.278152p-19f, 0x1.ddc94ap-20f,
        0x1.857df4p-20f, 0x1.3ffb52p-20f, 0x1.08c63ep-20f, 0x1.b9216p-21f,
        0x1.71c802p-21f, 0x1.37cabp-21f, 0x1.0857aap-21f, 0x1.c28b22p-22f,
    },
    {
        -0x1.a4ef68p-6f, -0x1.20c668p-7f, -0x1.a369bp-9f, -0x1.4ee3b4p-10f,
        -0x1.22b7a2p-11f, -0x1.0f99ccp-12f, -0x1.0e9ee2p-13f, -0x1.1d50acp-14f,
        -0x1.3c1c16p-15f, -0x1.6dddaap-16f, -0x1.b81b02p-17f, -0x1.11e822p-17f,
        -0x1.5f75ep-18f, -0x1.cf5fbcp-19f, -0x1.38fa8ep-19f, -0x1.b02446p-20f,
        -0x1.3049aap-20f, -0x1.b442c2p-21f, -0x1.3dde64p-21f, -0x1.d624f6p-22f,
        -0x1.6071f2p-22f, -0x1.0b883ap-22f, -0x1.9ada4ap-23f, -0x1.3ed864p-23f,
        -0x1.f3c6c8p-24f, -0x1.8b4836p-24f, -0x1.3b4d8ep-24f, -0x1.fb037p-25f,
        -0x1.9aac3ep-25f, -0x1.4ef3c4p-25f, -0x1.12f9b6p-25f, -0x1.c63e72p-26f,
    },
    {
        0x1.f39e78p-8f, 0x1.985408p-9f, 0x1.0c9902p-10f, 0x1.857d4cp-12f,
        0x1.33f6a2p-13f, 0x1.06f87cp-14f, 0x1.e0c508p-16f, 0x1.d2cea8p-17f,
        0x1.de22b2p-18f, 0x1.00c324p-18f, 0x1.1fa51cp-19f, 0x1.4e96fcp-20f,
        0x1.92819cp-21f, 0x1.f30a2p-22f, 0x1.3de0eap-22f, 0x1.9f053p-23f,
        0x1.15033ep-23f, 0x1.79578ap-24f, 0x1.05c8c8p-24f, 0x1.7167d2p-25f,
        0x1.08b2b2p-25f, 0x1.80c6dap-26f, 0x1.1b5c52p-26f, 0x1.a6731ap-27f,
        0x1.3e78e2p-27f, 0x1.e539e2p-28f, 0x1.7544c6p-28f, 0x1.21c4dcp-28f,
        0x1.c5be2ep-29f, 0x1.661952p-29f, 0x1.1cbda2p-29f, 0x1.c805bap-30f,
    },
};

}  // namespace
}  // namespace detinfer
